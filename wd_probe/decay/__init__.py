"""The paper's methods on any optimizer, and which decay rule an optimizer really runs."""
