"""What a run stands on, whatever it computes: where its random numbers come from."""
