"""Instruments: each declares a table, then turns a snapshot of training into one row of it."""
