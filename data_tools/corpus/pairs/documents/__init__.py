"""Documents as page images with the text of each page: pandoc reads them, typst sets them, pdfium draws the pages."""
