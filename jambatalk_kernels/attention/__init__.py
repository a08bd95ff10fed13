"""Grouped-query attention with rotary positions applied inside, causal and windowed, with a key-value cache."""
