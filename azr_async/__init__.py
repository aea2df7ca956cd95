"""Asynchronous, off-policy, streaming trainer for Absolute Zero self-play (arXiv 2505.03335).

Read `messages.py` first (everything that flows), then `programs/selfplay.py` (how it flows).
"""
