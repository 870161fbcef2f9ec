"""The DeepSeek-V3 mixture-of-experts model: its room; the architecture itself is not in this release."""
