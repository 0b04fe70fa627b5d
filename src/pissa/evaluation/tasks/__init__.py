"""Task files for lm-evaluation-harness: `lm_eval run --include_path` takes this folder too."""
