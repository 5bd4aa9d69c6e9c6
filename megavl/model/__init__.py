"""SigLIP, SAM, adaptor table, fused first stage, decoder, and which parameters train in which stage."""
