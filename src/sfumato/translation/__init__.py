"""Frozen networks' vectors, and invertible networks between them: what iin, net2net, cnn_invariances and data_biases
share."""
