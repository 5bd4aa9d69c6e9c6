"""From records to shards: job, worker processes, SLURM arrays, shard writer."""
