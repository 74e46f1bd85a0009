"""Programs built on hf_efficient_attn. Each is importable, has `main(args)`, and runs as `python examples/<name>.py`."""
