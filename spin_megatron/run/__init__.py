"""What every stage shares without torch: paths, manifests, row schemas, progress and metrics."""
