"""How good a LoRA is: scores, the papers' benchmark, and a page that asks people."""
