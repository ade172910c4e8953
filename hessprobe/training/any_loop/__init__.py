"""The instruments in a training loop that is not ours: hp.Recorder and what it needs to know about that loop."""
