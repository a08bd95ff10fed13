"""The whole autoregressive loop of a decoder in one call."""
