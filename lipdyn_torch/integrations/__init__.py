"""The monitor in other people's tools; each module imports its tool, nothing here imports any.

=======================================  ======================================================
`lipdyn_torch.integrations.sinks`        rows to TensorBoard, Parquet, MLflow, Weights & Biases
`lipdyn_torch.integrations.lightning`    a callback for Lightning's Trainer
`lipdyn_torch.integrations.huggingface`  a callback for the Trainer of Hugging Face transformers
=======================================  ======================================================
"""
