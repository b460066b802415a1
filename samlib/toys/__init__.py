"""Problems small enough to be solved in closed form or in seconds: where the theory of the chapters is exact."""
