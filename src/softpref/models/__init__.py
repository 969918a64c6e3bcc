"""A model and what it says of pairs: loading, layouts, passes over data, sampling."""
