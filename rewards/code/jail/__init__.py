"""What runs inside the sandbox: standard library only, never imported by the trainer itself."""
