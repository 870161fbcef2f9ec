"""Sampling in worker processes, here or on other hosts: docs/rollouts.md.

On the trainer's side `WorkerSampler` (sampler.py) deals prompts out (dispatch.py) by HTTP (client.py), and on its first
process a `Fleet` (fleet.py) starts workers (opening.py, launch.py), watches them and sends them weights (transfer.py).
The workers of a teacher get none (frozen.py). A worker (command.py) is an HTTP server (server.py) in front of one
thread that owns an engine (loop.py). Both sides share the messages (wire.py) and the form in which weights travel
(buckets.py, collective.py).
"""
