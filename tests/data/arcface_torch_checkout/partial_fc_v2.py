import torch
from torch import distributed


class PartialFC_V2(torch.nn.Module):
    def __init__(self, margin_loss, embedding_size, num_classes, sample_rate=1.0, fp16=False):
        super(PartialFC_V2, self).__init__()  # noqa: UP008 - the name is looked up in this module
        assert distributed.is_initialized()
        self.margin_softmax = margin_loss
        self.weight = torch.nn.Parameter(torch.normal(0, 0.01, (num_classes, embedding_size)))

    def forward(self, local_embeddings, local_labels):
        labels = local_labels.long().cuda()
        cosines = torch.nn.functional.normalize(local_embeddings) @ torch.nn.functional.normalize(self.weight).T
        return torch.nn.functional.cross_entropy(self.margin_softmax(cosines, labels.view(-1, 1)), labels)
