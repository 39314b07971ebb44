"""How each bundled data set is made from its original archive; one module a data set."""
