"""Forecasting of time series: training, evaluation against simple forecasts, the steps to come."""
