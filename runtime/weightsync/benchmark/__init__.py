"""`weightsync bench`: what two processes of this machine, or two nodes, reach through the product's own data path."""
