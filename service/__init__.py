"""The HTTP service over the rewriter library: uploads, jobs, workers."""
