"""Tasks of lm-evaluation-harness, run on a MegaVL model in process."""
