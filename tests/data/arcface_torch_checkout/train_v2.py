import argparse
import os

import torch
from backbones import get_model
from dataset import get_dataloader
from eval import verification
from losses import CombinedMarginLoss
from lr_scheduler import PolynomialLRWarmup
from partial_fc_v2 import PartialFC_V2
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from utils.utils_config import get_config

rank, local_rank, world_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
distributed.init_process_group("nccl")


def main(args):
    cfg = get_config(args.config)
    torch.manual_seed(cfg.seed)
    torch.cuda.set_device(local_rank)
    os.makedirs(cfg.output, exist_ok=True)
    seed = torch.tensor(cfg.seed, dtype=torch.int32, device="cuda")
    distributed.broadcast(seed, src=0)
    train_loader = get_dataloader(cfg.rec, local_rank, cfg.batch_size, seed.item(), cfg.num_workers)

    backbone = get_model(cfg.network, dropout=0.0, fp16=cfg.fp16, num_features=cfg.embedding_size).cuda()
    backbone = torch.nn.parallel.DistributedDataParallel(
        module=backbone, broadcast_buffers=False, device_ids=[local_rank], bucket_cap_mb=16,
        find_unused_parameters=True,
    )  # fmt: skip
    backbone.register_comm_hook(None, fp16_compress_hook)
    backbone.train()
    backbone._set_static_graph()
    margin_loss = CombinedMarginLoss(64, *cfg.margin_list, cfg.interclass_filtering_threshold)
    module_partial_fc = PartialFC_V2(margin_loss, cfg.embedding_size, cfg.num_classes, cfg.sample_rate, False)
    module_partial_fc.train().cuda()
    opt = torch.optim.AdamW(
        params=[{"params": backbone.parameters()}, {"params": module_partial_fc.parameters()}],
        lr=cfg.lr, weight_decay=cfg.weight_decay,
    )  # fmt: skip
    lr_scheduler = PolynomialLRWarmup(optimizer=opt, warmup_iters=0, total_iters=4)
    amp = torch.cuda.amp.grad_scaler.GradScaler(growth_interval=100)

    for epoch in range(cfg.num_epoch):
        for img, local_labels in train_loader:
            loss = module_partial_fc(backbone(img), local_labels)
            amp.scale(loss).backward()
            amp.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5)
            amp.step(opt)
            amp.update()
            opt.zero_grad()
            lr_scheduler.step()
            print(f"epoch {epoch} loss {loss.item():.4f} on {img.device}")
    if rank == 0:
        for name in cfg.val_targets:
            backbone.eval()
            data_set = verification.load_bin(os.path.join(cfg.rec, name + ".bin"), (112, 112))
            embeddings, issame = verification.test(data_set, backbone)
            print(f"{name}: {embeddings.shape} {issame.dtype} {issame.sum()}")
        torch.save(backbone.module.state_dict(), os.path.join(cfg.output, "model.pt"))
        softmax = module_partial_fc.state_dict()
        print("margin", type(margin_loss).__name__, "classes", sorted(softmax), "seed", seed.item())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=str)
    main(parser.parse_args())
