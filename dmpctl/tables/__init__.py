"""Tables of encoded images: which columns they have, parquet on a disk, streamed, and on the Hub."""
