"""What surrounds training: the run folder, checkpoints, metrics, progress and samples."""
