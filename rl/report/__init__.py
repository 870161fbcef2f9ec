"""`rl report`: what a run left, as one HTML file that needs no network.

`read` (a folder → plain data) → `figures`, `overview` and `completions` (what is shown) → `page` (HTML) → `command`.
"""
