"""Somebody's own training loop: hp.Recorder."""
