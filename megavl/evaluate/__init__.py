"""Multiple choice by perplexity."""
