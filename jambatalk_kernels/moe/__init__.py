"""Mixture-of-experts dispatch: route tokens to experts, run the experts' gated MLPs, balance the load."""
