package main

// The part of crictl that kind calls (inspecti, images) and that the lab's fault injection needs (ps, inspect, info).

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const containerdSocket = "unix:///run/containerd/containerd.sock"

type criClient struct {
	runtime cri.RuntimeServiceClient
	images  cri.ImageServiceClient
}

// criCommands maps a sub-command to a query whose answer is printed as JSON.
var criCommands = map[string]func(context.Context, criClient, string) (any, error){
	"version": func(ctx context.Context, c criClient, _ string) (any, error) {
		return c.runtime.Version(ctx, &cri.VersionRequest{})
	},
	"info": func(ctx context.Context, c criClient, _ string) (any, error) {
		return c.runtime.Status(ctx, &cri.StatusRequest{Verbose: true})
	},
	"images": func(ctx context.Context, c criClient, _ string) (any, error) {
		return c.images.ListImages(ctx, &cri.ListImagesRequest{})
	},
	"inspecti": inspectImage,
	"ps": func(ctx context.Context, c criClient, _ string) (any, error) {
		return c.runtime.ListContainers(ctx, &cri.ListContainersRequest{})
	},
	"inspect": inspectContainer,
	"pods": func(ctx context.Context, c criClient, _ string) (any, error) {
		return c.runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	},
}

// inspectImage answers in the shape of crictl, whose status.id kind compares with the image it is about to load.
func inspectImage(ctx context.Context, c criClient, ref string) (any, error) {
	answer, err := c.images.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: ref}})
	if err != nil {
		return nil, err
	}
	if answer.Image == nil {
		return nil, fmt.Errorf("no such image %q present", ref)
	}
	image := answer.Image
	return map[string]any{"status": map[string]any{
		"id": image.Id, "repoTags": image.RepoTags, "repoDigests": image.RepoDigests, "size": fmt.Sprint(image.GetSize()),
	}}, nil
}

// inspectContainer answers with the verbose status; its info.info is a JSON text that holds the pid.
func inspectContainer(ctx context.Context, c criClient, id string) (any, error) {
	return c.runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: id, Verbose: true})
}

func crictl(args []string) int {
	if len(args) == 0 || criCommands[args[0]] == nil {
		fmt.Fprintln(os.Stderr, "usage: crictl version|info|images|inspecti REF|ps|inspect ID|pods (answers are JSON)")
		return 2
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	connection, err := grpc.NewClient(containerdSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer connection.Close()
	client := criClient{cri.NewRuntimeServiceClient(connection), cri.NewImageServiceClient(connection)}
	answer, err := criCommands[args[0]](ctx, client, args[len(args)-1])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetIndent("", "  ")
	if err := encoder.Encode(answer); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}
