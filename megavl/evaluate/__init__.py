"""Multiple choice by perplexity, written answers, and bits per byte of texts."""
