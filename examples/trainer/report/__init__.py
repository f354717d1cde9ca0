"""What a run reports: metrics, progress, pictures, samples."""
