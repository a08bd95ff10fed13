"""Data sets: VOCASET as released (`vocaset`) and a synthetic corpus in the same layout (`synthetic`)."""
