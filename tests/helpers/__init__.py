"""What tests share: models, reporters, processes, damage. Files name things, and hold no tests."""
