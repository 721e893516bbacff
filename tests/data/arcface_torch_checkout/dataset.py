import numbers
import os
import threading

import mxnet as mx
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset


class DataLoaderX(DataLoader):
    """Moves batches to the device on a stream of their own, as the real one does."""

    def __init__(self, local_rank, **kwargs):
        super().__init__(**kwargs)
        self.stream = torch.cuda.Stream(local_rank)
        self.local_rank = local_rank

    def __iter__(self):
        threading.Thread(target=torch.cuda.set_device, args=(self.local_rank,)).start()
        for batch in super().__iter__():
            with torch.cuda.stream(self.stream):
                batch = [part.to(device=self.local_rank, non_blocking=True) for part in batch]
            torch.cuda.current_stream().wait_stream(self.stream)
            yield batch


class MXFaceDataset(Dataset):
    def __init__(self, root_dir):
        index, records = (os.path.join(root_dir, f"train.{kind}") for kind in ("idx", "rec"))
        self.imgrec = mx.recordio.MXIndexedRecordIO(index, records, "r")
        header, _ = mx.recordio.unpack(self.imgrec.read_idx(0))
        keys = range(1, int(header.label[0])) if header.flag > 0 else self.imgrec.keys
        self.keys = np.array(list(keys))

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, index):
        header, data = mx.recordio.unpack(self.imgrec.read_idx(self.keys[index]))
        label = header.label if isinstance(header.label, numbers.Number) else header.label[0]
        pixels = torch.from_numpy(mx.image.imdecode(data).asnumpy())
        return pixels.permute(2, 0, 1).float() / 127.5 - 1, torch.tensor(label, dtype=torch.long)


def get_dataloader(root_dir, local_rank, batch_size, seed, num_workers):
    return DataLoaderX(
        local_rank=local_rank, dataset=MXFaceDataset(root_dir), batch_size=batch_size, num_workers=num_workers,
        pin_memory=False, drop_last=True, shuffle=True,
    )  # fmt: skip
