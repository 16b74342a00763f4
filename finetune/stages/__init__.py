"""The chapters of a run: each takes plain values and returns plain values, or a small dataclass of them."""
