"""One sweep as frozen data, and how conf/ becomes it; the door to Hydra."""
