"""SGLang's model classes with cross blocks: a package for its ``ModelRegistry``."""
