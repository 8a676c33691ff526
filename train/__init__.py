"""Training: corpora, tokenizers, batches, a LightningModule and DataModule, and studies (grids of runs)."""
