"""What makes a backbone faster without changing what it computes: precision, compilation, attention, recomputation."""
