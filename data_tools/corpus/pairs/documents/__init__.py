"""Page images of documents with the text of each page: pandoc parses, typst typesets, pdfium renders."""
