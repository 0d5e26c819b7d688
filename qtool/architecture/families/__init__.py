"""One function per model type: config -> Body. A new one is a function here and a row in build."""
