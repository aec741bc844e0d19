"""Where panels come from: tables (CSV, parquet, Arrow) and simulation."""
