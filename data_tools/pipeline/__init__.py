"""From records to shards: job, workers, SLURM arrays, shard writer."""
