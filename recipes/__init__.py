"""Short scripts to read and copy: each shows one way to use `pq_ao` from start to end."""
