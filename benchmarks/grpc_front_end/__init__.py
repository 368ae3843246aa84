"""The gRPC front end alone, against bare servers of grpcio."""
