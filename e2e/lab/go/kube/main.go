// Command weightsync-kube is every Kubernetes program of the lab in one binary.
//
// The name it is called by (a symlink such as kube-apiserver), or else its first argument, picks the program.
// One link of the shared packages takes minutes less and hundreds of megabytes less than ten programs do.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/etcdmain"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/restclient"
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectl "k8s.io/kubectl/pkg/cmd"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubeadm "k8s.io/kubernetes/cmd/kubeadm/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

// programs run with os.Args as their own arguments and return the exit status.
var programs = map[string]func() int{
	"etcd":                    func() int { etcdmain.Main(os.Args); return 0 },
	"kubeadm":                 runKubeadm,
	"crictl":                  func() int { return crictl(os.Args[1:]) },
	"kube-apiserver":          fromCobra(apiserver.NewAPIServerCommand),
	"kube-controller-manager": fromCobra(controllermanager.NewControllerManagerCommand),
	"kube-scheduler":          fromCobra(func() *cobra.Command { return scheduler.NewSchedulerCommand() }),
	"kube-proxy":              fromCobra(proxy.NewProxyCommand),
	"kubelet":                 fromCobra(func() *cobra.Command { return kubelet.NewKubeletCommand(context.Background()) }),
	"kubectl":                 fromCobra(func() *cobra.Command { return kubectl.NewDefaultKubectlCommand() }),
}

func fromCobra(command func() *cobra.Command) func() int {
	return func() int { return cli.Run(command()) }
}

func runKubeadm() int {
	if err := kubeadm.Run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func main() {
	name := filepath.Base(os.Args[0])
	run, known := programs[name]
	if !known && len(os.Args) > 1 {
		os.Args = os.Args[1:]
		name = os.Args[0]
		run, known = programs[name]
	}
	if !known {
		fmt.Fprintf(os.Stderr, "%q is not a program of this binary\n", name)
		os.Exit(2)
	}
	os.Exit(run())
}
