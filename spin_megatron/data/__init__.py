"""From an SFT source to token ids, packs and batches."""
