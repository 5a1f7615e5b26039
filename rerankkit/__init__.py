"""rerankkit: reranking with reasoning language models, from parts that anybody can swap."""

__version__ = "0.1.0"
