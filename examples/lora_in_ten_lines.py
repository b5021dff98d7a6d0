"""LoRA on the bundled model and reviews: train, test the best checkpoint, write the adapter for HF PEFT."""

import lightning.pytorch as pl

from lit_peft import LoRA, save
from lit_peft.data import TextClassificationDataModule
from lit_peft.tasks import TextClassification

model = TextClassification(backbone="demo", learning_rate=2e-3)
data = TextClassificationDataModule(path="demo", val_split="validation", limit_train=512)
trainer = pl.Trainer(callbacks=[LoRA(r=8, target_modules=["query", "value"])], max_epochs=2)
trainer.fit(model, data)
trainer.test(model, data, ckpt_path="best")
save(model, "adapter")
