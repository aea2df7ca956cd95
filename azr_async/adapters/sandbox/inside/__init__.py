"""What runs in the sandboxed processes. Standard library only; the trainer starts it and never imports it."""
